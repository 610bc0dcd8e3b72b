//! Evictions: endpoints that the operator forbids, whichever source lists them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmesh_model::{Registration, ServiceName};

/// One evicted endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eviction {
    pub service: ServiceName,
    pub address: SocketAddr,
    /// The time at which the operator evicted the endpoint, in seconds of Unix time.
    pub since: u64,
}

/// All evictions, in the form in which they are persisted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Evictions(BTreeMap<ServiceName, BTreeMap<SocketAddr, u64>>);

impl Evictions {
    /// Evicts an endpoint. `since` is in seconds of Unix time. Returns `false` if it was evicted already.
    pub fn evict(&mut self, service: ServiceName, address: SocketAddr, since: u64) -> bool {
        let of_service = self.0.entry(service).or_default();
        let is_news = !of_service.contains_key(&address);
        of_service.entry(address).or_insert(since);
        is_news
    }

    /// Ends an eviction. Returns `false` if the endpoint was not evicted.
    pub fn admit(&mut self, service: &ServiceName, address: &SocketAddr) -> bool {
        let Some(of_service) = self.0.get_mut(service) else { return false };
        let is_news = of_service.remove(address).is_some();
        if of_service.is_empty() {
            self.0.remove(service);
        }
        is_news
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn contains(&self, service: &ServiceName, address: &SocketAddr) -> bool {
        self.0.get(service).is_some_and(|addresses| addresses.contains_key(address))
    }

    pub fn all(&self) -> impl Iterator<Item = Eviction> {
        self.0.iter().flat_map(|(service, addresses)| {
            let evicted = |(address, since): (&SocketAddr, &u64)| Eviction {
                service: service.clone(),
                address: *address,
                since: *since,
            };
            addresses.iter().map(evicted)
        })
    }

    /// Returns `registration` without its evicted endpoints; the same pointer if none is evicted.
    pub fn apply(&self, registration: Arc<Registration>) -> Arc<Registration> {
        let Some(evicted) = self.0.get(&registration.service) else { return registration };
        if !registration.endpoints.iter().any(|endpoint| evicted.contains_key(&endpoint.address)) {
            return registration;
        }
        let used = registration.endpoints.iter().filter(|e| !evicted.contains_key(&e.address)).cloned();
        Arc::new(Registration { endpoints: used.collect(), ..(*registration).clone() })
    }
}

/// Finds evictions that have become pointless, because no source has listed the endpoint for a while.
#[derive(Debug, Default)]
pub struct EvictionExpiry(BTreeMap<(ServiceName, SocketAddr), Instant>);

impl EvictionExpiry {
    /// Returns the evictions of endpoints for which `is_named` has been false for `hold`.
    pub fn expired(
        &mut self,
        evictions: &Evictions,
        is_named: impl Fn(&ServiceName, &SocketAddr) -> bool,
        hold: Duration,
        now: Instant,
    ) -> Vec<Eviction> {
        let unnamed = evictions.all().filter(|evicted| !is_named(&evicted.service, &evicted.address));
        let mut over = Vec::new();
        let mut since = BTreeMap::new();
        for evicted in unnamed {
            let key = (evicted.service.clone(), evicted.address);
            let unnamed_since = self.0.get(&key).copied().unwrap_or(now);
            if unnamed_since + hold <= now {
                over.push(evicted);
            } else {
                since.insert(key, unnamed_since);
            }
        }
        self.0 = since;
        over
    }

    /// Returns when the next eviction expires if no source lists its endpoint again.
    pub fn deadline(&self, hold: Duration) -> Option<Instant> {
        self.0.values().min().map(|since| *since + hold)
    }

    /// Restarts every wait, because a source does not answer and it is unknown what it lists.
    pub fn restart(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use vmesh_model::{Endpoint, Health, Labels, Place, Weight};

    use super::*;

    fn orders(addresses: &[&str]) -> Arc<Registration> {
        let endpoint = |address: &&str| Endpoint {
            address: address.parse().unwrap(),
            hostname: None,
            weight: Weight::ONE,
            health: Health::Unknown,
            zone: None,
            version: None,
            labels: Labels::new(),
            source: "test".into(),
        };
        Arc::new(Registration {
            service: "orders".parse().unwrap(),
            protocol: None,
            port: None,
            endpoints: addresses.iter().map(endpoint).collect(),
            place: Place::file("test"),
        })
    }

    #[test]
    fn what_is_evicted_is_not_used_and_what_is_not_keeps_its_pointer() {
        let mut evictions = Evictions::default();
        let service: ServiceName = "orders".parse().unwrap();
        let both = orders(&["10.0.0.1:80", "10.0.0.2:80"]);
        assert!(Arc::ptr_eq(&evictions.apply(both.clone()), &both));
        assert!(evictions.evict(service.clone(), "10.0.0.1:80".parse().unwrap(), 7));
        assert!(!evictions.evict(service.clone(), "10.0.0.1:80".parse().unwrap(), 9));
        assert_eq!(evictions.apply(both.clone()), orders(&["10.0.0.2:80"]));
        let kept = serde_json::to_string(&evictions).unwrap();
        assert_eq!(kept, r#"{"orders":{"10.0.0.1:80":7}}"#);
        assert_eq!(serde_json::from_str::<Evictions>(&kept).unwrap(), evictions);
        assert!(evictions.admit(&service, &"10.0.0.1:80".parse().unwrap()));
        assert!(!evictions.admit(&service, &"10.0.0.1:80".parse().unwrap()));
        assert!(Arc::ptr_eq(&evictions.apply(both.clone()), &both));
    }

    #[test]
    fn an_eviction_ends_when_nobody_has_named_the_endpoint_for_the_hold() {
        let (mut evictions, mut expiry) = (Evictions::default(), EvictionExpiry::default());
        let hold = Duration::from_secs(10);
        let (start, after) = (Instant::now(), |seconds| Duration::from_secs(seconds));
        evictions.evict("orders".parse().unwrap(), "10.0.0.1:80".parse().unwrap(), 7);
        let mut over =
            |named: bool, at: u64| expiry.expired(&evictions, |_, _| named, hold, start + after(at)).len();
        assert_eq!(over(true, 0), 0);
        assert_eq!(over(false, 5), 0);
        assert_eq!(over(false, 14), 0);
        assert_eq!(over(true, 15), 0, "it is named again");
        assert_eq!(over(false, 16), 0);
        assert_eq!(over(false, 26), 1);
    }
}
