"""Experiments: inversion and likelihood (ode), schedules made to measure (search)."""
