"""Runs whose number of nodes changes: ``ucp run`` starts torch's own elastic agents, and this package resumes the run.

`launch` starts an agent, `store` holds the rendezvous outside the agents, and `worker` is what agents start on each rank: it
leaves out ranks that the batch or the model-parallel sizes have no use for (`sizes`), which may follow the ranks and their memory
(`topologies`), and tells of each new round in one line (`rounds`).
"""
