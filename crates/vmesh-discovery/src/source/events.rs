//! The recent events of a source, for the API and `vmeshctl`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use vmesh_model::ServiceName;

use super::escape_text;
use crate::guard::{HoldKind, Notice, NoticeKind};

/// Something that happened to a source. Its text is escaped for terminals and logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub at: SystemTime,
    pub kind: NoticeKind,
    /// The service concerned. `None` if the event is about several services, which the text names, or about
    /// the source as a whole.
    pub service: Option<ServiceName>,
    pub hold: Option<HoldKind>,
    pub text: Arc<str>,
}

/// The most recent events of a source, the oldest first. Clones share the same list.
#[derive(Debug, Clone, Default)]
pub struct Events(Arc<Mutex<VecDeque<Event>>>);

impl Events {
    /// The number of events that are remembered.
    pub const KEPT: usize = 256;

    pub fn all(&self) -> Vec<Event> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Remembers `notices` and returns the events to log. Equal notices about many services become one event.
    pub fn record(&self, notices: Vec<Notice>, at: SystemTime) -> Vec<Event> {
        let events: Vec<_> = summarize(notices, at).collect();
        let mut remembered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for event in &events {
            while remembered.len() >= Self::KEPT {
                remembered.pop_front();
            }
            remembered.push_back(event.clone());
        }
        events
    }
}

/// Equal notices about at most this many services become an event each.
const ONE_BY_ONE: usize = 5;

fn summarize(notices: Vec<Notice>, at: SystemTime) -> impl Iterator<Item = Event> {
    let mut groups: Vec<Vec<Notice>> = Vec::new();
    for notice in notices {
        let is_like = |group: &&mut Vec<Notice>| {
            group.first().is_some_and(|first| {
                first.kind == notice.kind
                    && first.hold == notice.hold
                    && first.service.is_some()
                    && notice.service.is_some()
            })
        };
        match groups.iter_mut().find(is_like) {
            Some(group) => group.push(notice),
            None => groups.push(vec![notice]),
        }
    }
    groups.into_iter().flat_map(move |group| {
        let event = |notice: Notice| {
            let Notice { kind, service, hold, text } = notice;
            Event { at, kind, service, hold, text: escape_text(&text) }
        };
        let names: Vec<_> = group.iter().filter_map(|notice| notice.service.as_ref()).collect();
        match (group.first(), names.get(..3)) {
            (Some(first), Some(some)) if group.len() > ONE_BY_ONE => {
                let some = some.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
                let text = format!(
                    "{} services: {some} and {} more; of the first: {}",
                    names.len(),
                    names.len() - 3,
                    first.text
                );
                vec![event(Notice { service: None, text: text.into(), ..first.clone() })]
            }
            _ => group.into_iter().map(event).collect(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(service: &str) -> Notice {
        Notice {
            kind: NoticeKind::Held,
            service: Some(service.parse().unwrap()),
            hold: Some(HoldKind::Absent),
            text: "it is gone".into(),
        }
    }

    #[test]
    fn what_happens_to_many_at_once_is_one_event() {
        let events = Events::default();
        let notices = (0..9).map(|n| notice(&format!("s{n}"))).collect();
        let text = "9 services: `s0`, `s1`, `s2` and 6 more; of the first: it is gone";
        assert_eq!(&*events.record(notices, SystemTime::UNIX_EPOCH)[0].text, text);
        assert_eq!(events.record(vec![notice("a"), notice("b")], SystemTime::UNIX_EPOCH).len(), 2);
        assert_eq!(events.all().len(), 3);
    }

    #[test]
    fn the_oldest_is_forgotten() {
        let events = Events::default();
        for n in 0..300 {
            events.record(vec![notice(&format!("s{n}"))], SystemTime::UNIX_EPOCH);
        }
        let all = events.all();
        assert_eq!(all.len(), Events::KEPT);
        assert_eq!(all[0].service, Some("s44".parse().unwrap()));
    }
}
