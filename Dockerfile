# docker build -t jaxsd .                           for NVIDIA GPUs, CUDA 13
# docker build -t jaxsd --build-arg EXTRAS=tpu .    or cuda12; EXTRAS= for the CPU; cuda13,serve ...
# docker run --gpus all -v jaxsd:/cache -v "$PWD:/work" jaxsd generate --prompt="red apple"
# /cache keeps compiled programs and files of the Hub; user 1000 must be able to write to /work.
FROM python:3.12-slim
ARG EXTRAS=cuda13
RUN --mount=type=bind,target=/src,rw \
    pip install --no-cache-dir "/src${EXTRAS:+[$EXTRAS]}"
RUN useradd --uid 1000 --create-home jaxsd && install -d -o 1000 /cache /work
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
VOLUME /cache
USER 1000
WORKDIR /work
ENTRYPOINT ["jaxsd"]
