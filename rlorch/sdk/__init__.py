"""The public Python API: training, sampling and deployment with the names of the Fireworks and Tinker SDKs.

Import its names from `rlorch`. Blocking calls run on an event loop in a thread of their own (`connection`), training
calls return futures (`futures`) and run in call order (`operations`), and tinker's types are converted in one place
(`tinker_types`).
"""
