#!/bin/sh
# What `make test` cannot check without tools from elsewhere: deploy/check.sh. promtool comes from the
# distribution (Debian: prometheus), checkov from PyPI; kubectl is to be 1.24 or later.
set -eu
cd "$(dirname "$0")/.."
for tool in promtool kubectl; do
    command -v "$tool" >/dev/null || { echo "deploy-check needs $tool" >&2; exit 1; }
done
rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT

promtool check config deploy/prometheus/prometheus.yml
promtool test rules deploy/prometheus/rules_test.yaml
for overlay in cpu gpu keda; do
    kubectl kustomize "deploy/kubernetes/overlays/$overlay" >"$rendered/$overlay.yaml"
    .venv/bin/kubernetes-validate --strict "$rendered/$overlay.yaml" >"$rendered/log" || {
        cat "$rendered/log"; exit 1; }
    echo "$overlay: $(grep -c passed "$rendered/log") objects are sound"
done

if [ ! -x .venv/checkov/bin/checkov ]; then
    python3 -m venv .venv/checkov
    .venv/checkov/bin/pip install --quiet checkov
fi
# Left out, with reasons: images by digest (43) and pulled always (15) are the operator's choice, who
# builds them; CPU limits (11) throttle what requests already bound; secrets as files (35) would hide
# the password from the URLs that name it; user ids above 10000 (40) are not the Redis image's.
skipped=CKV_K8S_43,CKV_K8S_15,CKV_K8S_11,CKV_K8S_35,CKV_K8S_40
.venv/checkov/bin/checkov --quiet --compact --skip-download --framework kubernetes \
    --skip-check "$skipped" --directory "$rendered"
# 7: the base's tag is an argument, which checkov does not read
.venv/checkov/bin/checkov --quiet --compact --skip-download --framework dockerfile \
    --skip-check CKV_DOCKER_7 --file Dockerfile
