"""`answer`, and with it what answering imports: processes import this ahead, and orders are forked from them.

Importing it touches no device.
"""

from __future__ import annotations

from transformers.models.llama import modeling_llama as modeling_llama

from harness.runner.orders import answer as answer
from harness.runner.worker import MethodWorker as MethodWorker
