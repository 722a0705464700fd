"""What nights bring: kills, full disks, damaged files. ``python -m tests.faults.campaign --help``."""
