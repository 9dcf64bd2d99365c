"""The interface of a method, where authors look for it first."""

from harness.engine.method import Method as Method
from harness.engine.method import ModelContext as ModelContext
