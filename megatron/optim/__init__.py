"""Optimization: gradients go in, new weights come out; learning rate, weight decay, loss scale, norms and clipping."""
