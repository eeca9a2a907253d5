"""One server for chat and embeddings: one copy of the weights, one packed step.

    protocol, app, metrics   HTTP: request and reply formats, the endpoints, metrics for Prometheus
    engine                   the thread that owns the model: requests in, results out
    scheduler                decides which rows of which requests the next step computes
    step, arena              the step itself, and the key-value memory of its sequences

``grit serve`` is :mod:`python_model.commands.serve`.
"""
