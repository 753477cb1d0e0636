# The package on one Python, tested while it is built:  docker build --build-arg PYTHON=3.12 -t lavis_aurora .
ARG PYTHON=3.11
FROM python:${PYTHON}-slim
ARG PYTHON
RUN pip install --no-cache-dir uv && useradd --create-home aurora
USER aurora
WORKDIR /home/aurora/lavis_aurora
COPY --chown=aurora . .
ENV UV_NO_CACHE=1 MATRIX=/home/aurora/venvs
RUN bash scripts/test_matrix.sh "$PYTHON"
ENV PATH=/home/aurora/venvs/${PYTHON}/bin:$PATH
CMD ["lavis-aurora", "doctor"]
