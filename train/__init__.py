"""Pre-training, fine-tuning, inference, their schedules, metrics, tracking, pictures and report."""
