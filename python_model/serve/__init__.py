"""One server for chat and embeddings: one copy of the weights, one packed step.

    protocol, app, metrics   HTTP: what a request may say, the endpoints, what Prometheus reads
    engine                   one thread that owns the model; requests in, results out
    scheduler                which rows of which requests the next step computes
    step, arena              the step itself, and the memory of keys and values that its sequences own

``grit serve`` is :mod:`python_model.commands.serve`.
"""
