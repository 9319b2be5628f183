"""One self-contained HTML page of a run.

In: a run's folder, whatever it holds. Out: ``report.html`` with tables, curves and pictures, which works offline. Reads files
only; it imports neither torch nor DALI.
"""
