#!/bin/sh
# Installs Debian's Slurm and MUNGE, for the tests of launch_training.slurm (they start it on loopback). As root; no service is
# started.
#   sh scripts/install_slurm.sh
set -eu

if command -v sbatch >/dev/null && command -v slurmctld >/dev/null && command -v munged >/dev/null; then
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
PACKAGES="slurmctld slurmd slurm-client munge"
# shellcheck disable=SC2086  # several names
apt-get install -y --no-install-recommends $PACKAGES >/dev/null 2>&1 ||
    { apt-get update >/dev/null && apt-get install -y --no-install-recommends $PACKAGES >/dev/null; }
