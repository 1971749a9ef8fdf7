# Built by `make image` (deploy/image.sh), which makes the wheels in build/image and knows the base's Python.
# BASE needs a Python 3.11 or newer as python3, and nothing else.
ARG BASE

FROM ${BASE} AS installed
COPY wheels /wheels
# A wheel of pip is enough to run it: none has to be in the base, and none is left in the image.
RUN python3 "$(ls /wheels/pip-*.whl)/pip" install --no-index --find-links /wheels --no-compile --no-cache-dir \
        --disable-pip-version-check --root-user-action ignore --target /opt/ringside /wheels/ringside-*.whl \
    && find /opt/ringside -name tests -type d -prune -exec rm -r {} + \
    && python3 -m compileall -q /opt/ringside \
    && rm -rf /opt/ringside/bin && mkdir /opt/ringside/bin \
    && printf '#!/bin/sh\nexec python3 -m ringside.sensor.cli "$@"\n' > /opt/ringside/bin/ringside \
    && chmod 755 /opt/ringside/bin/ringside

FROM ${BASE}
COPY --from=installed /opt/ringside /opt/ringside
ENV PYTHONPATH=/opt/ringside \
    PATH=/opt/ringside/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    RINGSIDE_HOST_ROOT=/host
VOLUME /run/ringside
ENTRYPOINT ["ringside"]
CMD ["serve"]
