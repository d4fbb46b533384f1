"""What runs on the machines: standard library only, sent over ssh as source, nothing to install beforehand."""
