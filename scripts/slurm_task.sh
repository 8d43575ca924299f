#!/usr/bin/env bash
# What srun starts once per task: slurm_task.sh FILE COMMAND. An exit code other than 0 and 143 is noted in FILE.
# When one task fails, srun ends the others with SIGTERM and returns the highest code of all: theirs, 143, which would be
# taken for a training that saved its work.
trap : TERM USR1  # they reach the command too, and it is the command that answers
failed=$1
shift
code=0
"$@" || code=$?
[ "$code" != 138 ] || code=143  # SIGUSR1 came before the command could answer it
[ "$code" = 0 ] || [ "$code" = 143 ] || echo "$code" > "$failed"
exit "$code"
