"""The load hook: decide who loads, plan, fill the engine, and restore the run."""
