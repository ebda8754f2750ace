#!/bin/bash
# Trains on machines of a SLURM cluster, and goes on where it was when its time is up or it has to make way:
#
#   sbatch scripts/slurm.sh --config configs/gpt2.yaml --name gpt2 --data.files poems.csv --data.columns text
#
# Submit it from the project's folder, with its environment active, and with a --name of its own for each run: of that
# name it goes on. The files and logs/ must be shared by the machines. Two minutes before its end the run saves its step
# and stops, and the job is queued again; one that is done, has failed or was cancelled is not.

#SBATCH --job-name=lit_gpt
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm_%j.txt

again=no
trap 'again=yes; kill -TERM "$step"' USR1
trap 'kill -TERM "$step"' TERM

srun python scripts/fit.py --trainer.num_nodes "$SLURM_JOB_NUM_NODES" \
    --trainer.devices "$SLURM_NTASKS_PER_NODE" "$@" --ckpt_path auto &
step=$!

wait "$step"
while kill -0 "$step" 2>/dev/null; do # a signal ends a wait
    wait "$step"
done
wait "$step"
status=$?

if [ "$again" = yes ] && [ "$status" = 143 ]; then # 128 + SIGTERM: saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
