//! One ephemeral node.
pub struct Holder;
