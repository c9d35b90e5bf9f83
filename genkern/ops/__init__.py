"""The ops, one folder each: op.py (arguments, backend, autograd, torch.library), reference.py."""
