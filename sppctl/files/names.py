"""Names of directories and files in a run directory, and of weights."""

DIRECTORIES = {"prune": "pruned", "train": "adapter", "merge": "merged"}  # what each stage publishes
LOG = "sppctl.log"  # of a run: the messages of all commands, with times
# transformers' names: the weights, or the index of their shards
SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
RECORD = "stage.json"  # settings, inputs and results of a published directory; written last
FOREIGN = "foreign adapter"  # merging: the input that is an adapter without a record of training
RESOLVED = "resolved.yaml"  # the configuration of the last command
NOTE = "attempt.json"  # settings and inputs of an unfinished stage
JOURNAL = "journal.jsonl"  # pruning: one line per finished block
COPIED = "copied"  # pruning: exists once the dense checkpoint has been copied
ALLOCATION = "allocation.json"  # pruning: the allocated ratios
CHANNELS = "channels.json"  # pruning: the orders of channels; exists once the copy has them
CHECKPOINTS = "checkpoints"  # training
SAMPLES = "samples.json"  # what the checkpoints of a run write after a few prompts
# deleted when a stage is complete; the note last, because it identifies the other files
WORKING = (JOURNAL, COPIED, ALLOCATION, CHANNELS, CHECKPOINTS, NOTE)
