# docker build -f launch/docker/tpu.Dockerfile -t distill-jax:tpu .
# libtpu comes with jax's wheels.
FROM python:3.12-slim
RUN useradd --create-home --uid 1000 user
WORKDIR /opt/distill_jax
COPY pyproject.toml constraints-py312.txt README.md ./
# The dependencies alone first: a change of the code does not install them again.
RUN mkdir distill_jax && touch distill_jax/__init__.py \
 && pip install --no-cache-dir -c constraints-py312.txt -e '.[tpu,quantized,gcs]'
COPY distill_jax distill_jax
COPY configs configs
COPY launch launch
COPY benchmarks benchmarks
USER user
ENV PYTHONUNBUFFERED=1 PYTHON=python
ENTRYPOINT ["bash", "-c", ". launch/env.sh && distill_jax_env \"$(distill_jax_platform)\" && exec python -m distill_jax \"$@\"", "distill-jax"]
