"""The control layer: load, pressure, coherence, health and temperature of every expert, one tick per optimizer step."""
