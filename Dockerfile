# One image for the four services: `python -m transmitter | channel_sim | receiver | gateway`.
#   docker compose build --build-arg PIP_TORCH_ARGS="--index-url URL"     another build of torch
FROM python:3.11-slim AS build

ARG TORCH="torch==2.13.0"
ARG PIP_TORCH_ARGS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

WORKDIR /app
RUN python -m venv /opt/edsc
ENV PATH="/opt/edsc/bin:$PATH"

# What changes least comes first: torch, then the other dependencies, then our code.
COPY constraints.txt pyproject.toml ./
# hadolint ignore=DL3013,SC2086
RUN grep -v '^torch==' constraints.txt > /tmp/others.txt \
    && pip install --constraint /tmp/others.txt ${PIP_TORCH_ARGS} "${TORCH}"
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /tmp/wanted.txt \
    && pip install --constraint /tmp/others.txt --requirement /tmp/wanted.txt
COPY . .
# In place: the code finds weights/ and samples/ beside it, as in a checkout.
RUN pip install --no-deps --editable .

FROM python:3.11-slim

# /var/lib/edsc is the gateway's state: a volume mounted there starts with this owner.
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin edsc \
    && install -d -o 10001 -g 10001 -m 700 /var/lib/edsc
COPY --from=build /opt/edsc /opt/edsc
COPY --from=build /app /app

ENV PATH="/opt/edsc/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

USER 10001
WORKDIR /app
# Nothing is written outside /tmp and the gateway's /var/lib/edsc: the root is read-only.
EXPOSE 8000 50051 50052 50053
STOPSIGNAL SIGTERM
CMD ["python", "-m", "gateway"]
