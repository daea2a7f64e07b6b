#!/bin/bash
# One run on several machines: `sbatch examples/cluster/slurm.sh --config run.yaml`, with arguments of `lightning-ft fit`.
#SBATCH --job-name=lightning-ft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60

# A minute before the time limit this script gets the signal, and puts the job back into the queue.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

srun lightning-ft fit "$@" --config examples/cluster/slurm.yaml --ckpt_path last \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" &
wait "$!" # bash runs the trap while it waits, but not while a command runs in the foreground
