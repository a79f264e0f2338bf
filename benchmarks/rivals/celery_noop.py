# mypy: ignore-errors
"""celery: `celery -A celery_noop worker` is the worker, `python celery_noop.py` the client."""

import os

from celery import Celery
from closed_loop import serve_in_threads

URL = os.environ["REDIS_URL"]
app = Celery("celery_noop", broker=URL, backend=URL)
app.conf.update(
    task_acks_late=True,  # the default loses the job of a killed worker
    worker_prefetch_multiplier=1,
    task_ignore_result=False,
    result_expires=60,
    broker_connection_retry_on_startup=True,
    redis_max_connections=600,
    broker_pool_limit=300,
)


@app.task(name="noop")
def noop(number):
    return number


def call(number):
    return noop.delay(number).get(timeout=30)


if __name__ == "__main__":
    call(0)
    serve_in_threads(call)
