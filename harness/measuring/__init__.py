"""Instruments: clocks, memory, ceilings of the device, the state of the GPU, where a run was made."""
