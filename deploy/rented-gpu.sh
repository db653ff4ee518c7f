#!/usr/bin/env bash
# Starts a server with an API key and TLS on a bare Ubuntu with an NVIDIA driver: docs/rented-gpu.md.
#   deploy/rented-gpu.sh [docker | environment]
# Default: docker if it works, otherwise environment, for boxes that are containers themselves.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "rented-gpu: $*" >&2; exit 1; }
say() { echo "rented-gpu: $*" >&2; }

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >&2 ||
  die "expected an NVIDIA driver, but nvidia-smi fails: rent a box with one, or start the container with --gpus all"
way=${1:-$(docker info >/dev/null 2>&1 && echo docker || echo environment)}

# The API key, and the certificate that clients trust. Created once.
keys=${CLIP_KEYS:-$PWD/.cache/keys}
mkdir -p "$keys"
if [ ! -s "$keys/cert.pem" ]; then
  host=${CLIP_HOST:-$(hostname -I | cut -d ' ' -f 1)}
  [[ $host =~ ^[0-9.]+$ ]] && name="IP:$host" || name="DNS:$host"
  openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj "/CN=$host" -addext "subjectAltName=$name,DNS:localhost" \
    -keyout "$keys/key.pem" -out "$keys/cert.pem" 2>/dev/null
  (umask 077 && openssl rand -hex 32 >"$keys/api-key")
fi
CLIP_API_KEY=$(cat "$keys/api-key")
export CLIP_API_KEY
say "key and certificate for clients: $keys/api-key, $keys/cert.pem"

case $way in
docker)
  # WITH_EXPORT=1: the first start downloads the weights, exports them, and builds the plan.
  docker build --build-arg WITH_EXPORT=1 -t clip-embed:local .
  docker run --detach --name clip --gpus all --init --stop-timeout 70 --restart unless-stopped \
    --shm-size 1g --read-only --tmpfs /tmp:mode=1777,size=256m --cap-drop ALL --security-opt no-new-privileges:true \
    --publish 127.0.0.1:8000:8000 --publish 127.0.0.1:8001:8001 --publish 127.0.0.1:8002:8002 \
    --volume clip-cache:/var/cache/clip-embed --env CLIP_API_KEY clip-embed:local
  until [ "$(docker inspect --format '{{.State.Health.Status}}' clip)" = healthy ]; do
    [ "$(docker inspect --format '{{.State.Running}}' clip)" = true ] || { docker logs --tail 5 clip >&2; die "the container exited"; }
    sleep 10
  done
  say "ready on this machine's port 8001; for other machines put the nginx of deploy/compose.tls.yaml in front of it"
  ;;
environment)
  if ! command -v "${PYTHON:=python3.11}" >/dev/null || ! command -v make >/dev/null; then
    apt-get update -q
    apt-get install -qy make git software-properties-common
    apt-cache show python3.11 >/dev/null 2>&1 || add-apt-repository -y ppa:deadsnakes/ppa # Ubuntu 24.04 has no 3.11
    apt-get install -qy python3.11 python3.11-venv python3.11-dev libpython3.11
  fi
  make "${SETUP:-setup-gpu}" PYTHON="$PYTHON"
  # gRPC with TLS listens on every address, HTTP and its JSON only on this machine (SECURITY.md).
  exec make serve ARGS="--host 0.0.0.0 --tls-cert $keys/cert.pem --tls-key $keys/key.pem ${ARGS:-}"
  ;;
*) die "expected docker or environment, got $way" ;;
esac
