"""Runs: from settings to data, network and trainer."""
