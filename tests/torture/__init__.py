"""Torture: harnesses that look for faults at random while they may, and planted defects that each must find."""
