"""What every room stands on: errors with their exit codes, whole-or-nothing files, progress bars, command-line options."""
