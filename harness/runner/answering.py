"""`answer`, and with it what answering imports: processes import this ahead, and orders are forked from them.

Importing it touches no device, and neither does what `answer.ahead` does.
"""

from __future__ import annotations

from transformers.models.llama import modeling_llama as modeling_llama

from harness.runner.ahead import Answering
from harness.runner.catalog import METHODS, TASKS
from harness.runner.worker import MethodWorker as MethodWorker

METHODS.names()
TASKS.names()
answer = Answering()
