#!/bin/sh
# Make a Debian base image for buildah without a container registry: deploy/base.sh NAME.
# The host's CA certificates are copied into it, because its package indexes may need them.
set -eu
for tool in mmdebstrap buildah; do
    command -v "$tool" >/dev/null || { echo "apt-get install $tool" >&2; exit 1; }
done
export STORAGE_DRIVER="${STORAGE_DRIVER:-vfs}"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$folder/root.tar"
container=$(buildah from scratch)
buildah add --quiet "$container" "$folder/root.tar" / >/dev/null
if [ -f /etc/ssl/certs/ca-certificates.crt ]; then
    buildah copy --quiet "$container" /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ >/dev/null
fi
buildah commit --quiet --rm "$container" "localhost/$1" >/dev/null
