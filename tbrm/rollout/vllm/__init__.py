"""Rollouts by vLLM: servers of their own (`server`), or inside this process (`colocated`)."""
