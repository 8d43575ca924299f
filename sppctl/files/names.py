"""Names of directories and files in a run directory."""

DIRECTORIES = {"prune": "pruned", "train": "adapter", "merge": "merged"}  # what each stage publishes
RECORD = "stage.json"  # written last: what a published directory was made from
NOTE = "attempt.json"  # in an unfinished stage: what it is an attempt at
JOURNAL = "journal.jsonl"  # of pruning: a line for each finished block
COPIED = "copied"  # of pruning: the dense checkpoint has been copied
ALLOCATION = "allocation.json"  # of pruning: ratios that have been found
CHECKPOINTS = "checkpoints"  # of training
# no part of a finished stage; the note goes last, for without it nobody can tell whose the others are
WORKING = (JOURNAL, COPIED, ALLOCATION, CHECKPOINTS, NOTE)
