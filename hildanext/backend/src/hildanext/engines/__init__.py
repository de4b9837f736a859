"""Ways to answer requests behind one interface. To add one: write the file, add its row, add its case.

A row's class is a frozen section of knobs with `open(model, parent, reason) -> Engine`; it imports what it needs
inside, so that reading this table loads no torch.
"""
