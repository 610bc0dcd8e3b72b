//! The locality zones in which services have endpoints.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_model::ServiceName;

/// The number of endpoints in each locality zone. A node reports its own zone, so the compiler ignores zones
/// without endpoints: otherwise every made-up zone would add a class.
#[derive(Debug, Default)]
pub(crate) struct Zones(BTreeMap<Arc<str>, usize>);

impl Zones {
    /// Reports whether any service has an endpoint in `zone`.
    pub(crate) fn has_endpoints(&self, zone: &str) -> bool {
        self.0.contains_key(zone)
    }

    /// Updates the counts for the services `names`. Returns whether a zone got its first endpoint or lost its
    /// last one.
    pub(crate) fn update<'a>(
        &mut self,
        before: Option<&World>,
        now: &World,
        names: impl IntoIterator<Item = &'a ServiceName>,
    ) -> bool {
        let mut is_changed = false;
        for name in names {
            let zones = |world: &World| -> Vec<Arc<str>> {
                world.endpoints(name).iter().filter_map(|endpoint| endpoint.zone.clone()).collect()
            };
            for zone in zones(now) {
                let count = self.0.entry(zone).or_insert(0);
                is_changed |= *count == 0;
                *count += 1;
            }
            for zone in before.map(zones).unwrap_or_default() {
                let Some(count) = self.0.get_mut(&zone) else { continue };
                *count -= 1;
                if *count == 0 {
                    self.0.remove(&zone);
                    is_changed = true;
                }
            }
        }
        is_changed
    }
}
