"""What raw annotations have in common: JSON lists, Karpathy's form, tables, folders."""
