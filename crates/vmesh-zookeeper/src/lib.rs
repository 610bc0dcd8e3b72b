//! ZooKeeper for vmesh: a subtree mirrored, and an ephemeral node kept.
