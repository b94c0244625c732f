# Ranks, coordinators and gateways. BASE needs Python 3.11 or newer as python3, with venv and pip;
# for GPUs take a base with the CUDA libraries that the pinned torch was built for.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# Empty where the dependencies come with the base or a mounted environment (air-gapped builds, the node tests).
ARG EXTRAS=runtime
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY operator operator
COPY runtime runtime
RUN python3 -m venv /opt/moerator \
 && if [ -n "${EXTRAS}" ]; then \
      /opt/moerator/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" \
      && /opt/moerator/bin/python -m compileall -q /opt/moerator; \
    else \
      mkdir /opt/moerator/app && cp -r operator/moe_core operator/moe_operator runtime/moe_runtime /opt/moerator/app/; \
    fi

FROM ${BASE}
COPY --from=build /opt/moerator /opt/moerator
ENV PATH=/opt/moerator/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["moe-pod"]
