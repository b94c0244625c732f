# Ranks, coordinators and gateways. BASE needs Python 3.11 or newer as python3, with venv and pip;
# for GPUs take a base with the CUDA libraries that the pinned torch was built for.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# Empty installs only moerator itself: its dependencies are then mounted at /opt/site-packages (air-gapped clusters and
# the node tests, where a torch of 6 GB is not copied into an image).
ARG EXTRAS=runtime
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY operator operator
COPY runtime runtime
RUN python3 -m venv --without-pip /opt/moerator \
 && if [ -n "${EXTRAS}" ]; then \
      python3 -m venv --upgrade --upgrade-deps /opt/moerator \
      && /opt/moerator/bin/python -m pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" \
      && /opt/moerator/bin/python -m compileall -q /opt/moerator; \
    else \
      mkdir -p /opt/moerator/app /opt/site-packages \
      && cp -r operator/moe_core operator/moe_operator runtime/moe_runtime /opt/moerator/app/ \
      && printf '/opt/moerator/app\n/opt/site-packages\n' > "$(echo /opt/moerator/lib/python3*/site-packages)/moerator.pth" \
      && printf '#!/opt/moerator/bin/python\nfrom moe_runtime.pod import main\n\nmain()\n' > /opt/moerator/bin/moe-pod \
      && chmod +x /opt/moerator/bin/moe-pod; \
    fi

FROM ${BASE}
COPY --from=build /opt/moerator /opt/moerator
ENV PATH=/opt/moerator/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["moe-pod"]
