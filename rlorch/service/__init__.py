"""Jobs, deployments, models in training and checkpoints, behind one object: the SDK and the server both call it."""
