"""Decoupled DMD's objectives as pure functions of clean predictions (x_hat), never networks."""
