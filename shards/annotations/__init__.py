"""One adapter a dataset: from its annotation files and images to the rows of a manifest and of findings."""
