#!/usr/bin/env bash
# srun starts this once per task: slurm_task.sh FILE COMMAND. An exit code other than 0 and 143 is written to FILE.
# When one task fails, srun ends the others with SIGTERM and returns the highest exit code. This is the 143 of the ended
# tasks, which would look like a training that saved its work.
trap : TERM USR1  # the command receives them, too, and handles them
failed=$1
shift
code=0
"$@" || code=$?
[ "$code" != 138 ] || code=143  # SIGUSR1 arrived before the command could handle it
[ "$code" = 0 ] || [ "$code" = 143 ] || echo "$code" > "$failed"
exit "$code"
