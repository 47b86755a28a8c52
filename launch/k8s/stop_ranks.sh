#!/usr/bin/env bash
# Asks the ranks of this pod to save a checkpoint and waits for their end; a launcher would end them before that.
# Kubernetes calls it before it ends the pod (preStop), and gives both terminationGracePeriodSeconds.
set -uo pipefail
ranks='python[^ ]* -u launch/train\.py'  # the launcher's own command line has no -u
pkill -TERM -f "$ranks"
while pgrep -f "$ranks" >/dev/null; do sleep 1; done
