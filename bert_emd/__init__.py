"""Distillation: student layers learn from teacher layers, matched by an earth mover's distance."""
