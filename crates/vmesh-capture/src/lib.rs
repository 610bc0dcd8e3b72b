pub mod apply;
pub mod confirm;
pub mod host;
pub mod iptables;
pub mod nft;
pub mod plan;
pub mod program;
pub mod spec;

pub use host::Host;
pub use plan::Plan;
pub use program::{Note, Program, Stage};
pub use spec::Spec;
