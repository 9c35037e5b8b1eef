# The server and its workers. For GPUs: docker build --build-arg DEVICE=cuda .
FROM python:3.13-slim

# cpu, or cuda, whose libraries come with PyTorch and take several GB
ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN if [ "$DEVICE" = cpu ]; then \
        pip install "torch>=2.11,<2.14" --index-url https://download.pytorch.org/whl/cpu; \
    fi

COPY pyproject.toml README.md LICENSE NOTICE /source/
COPY src /source/src
RUN pip install "/source[web]" && rm -r /source

RUN useradd --uid 1000 --create-home cogvideo && install --directory --owner=cogvideo /videos
USER 1000
WORKDIR /videos
VOLUME /videos
EXPOSE 8000
ENTRYPOINT ["cogvideo"]
CMD ["serve", "--host", "0.0.0.0", "--folder", "/videos"]
