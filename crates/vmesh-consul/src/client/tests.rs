use super::*;

#[test]
fn a_query_is_what_is_set_and_nothing_more() {
    let plain = Client::new(&Config::default());
    assert_eq!(plain.target("/v1/catalog/services", &Query::default()), "/v1/catalog/services");
    let config =
        Config { namespace: Some("team a".to_owned()), partition: Some("p".to_owned()), ..Config::default() };
    let query = Query {
        index: 7,
        wait: Duration::from_secs(3600),
        origin: 0,
        consistency: Consistency::Stale,
        datacenter: Some("dc1".into()),
        flags: &["recurse"],
    };
    assert_eq!(
        Client::new(&config).target("/v1/kv/a", &query),
        "/v1/kv/a?stale&index=7&wait=600000ms&recurse&dc=dc1&ns=team%20a&partition=p"
    );
    assert_eq!(escaped("a b/ö?&-._~"), "a%20b%2F%C3%B6%3F%26-._~");
}

/// Starts a server that sends `length` bytes in answer to each request, as far as the client reads them.
async fn pouring(tasks: &mut JoinSet<()>, length: usize, sent: Arc<AtomicUsize>) -> Address {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            let sent = sent.clone();
            connections.spawn(async move {
                let mut line = String::new();
                while stream.read_line(&mut line).await.unwrap_or(0) > 2 {
                    line.clear();
                }
                let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                let chunk = [&b"10000\r\n"[..], &[b' '; 1 << 16], b"\r\n"].concat();
                _ = stream.get_mut().write_all(head.as_bytes()).await;
                for _ in 0..length >> 16 {
                    if stream.get_mut().write_all(&chunk).await.is_err() {
                        return;
                    }
                    sent.fetch_add(1 << 16, Ordering::Relaxed);
                }
                _ = stream.get_mut().write_all(b"0\r\n\r\n").await;
            });
        }
    });
    address
}

#[tokio::test]
async fn an_answer_without_end_is_not_read_to_its_end() {
    let (mut tasks, sent) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    let address = pouring(&mut tasks, 1 << 30, sent.clone()).await;
    let client = Client::new(&Config::of([address]));
    let failed = client.get_bytes("/v1/health/service/a", &Query::default()).await.unwrap_err();
    assert_eq!(failed.kind, ErrorKind::BadBody(format!("it is larger than {MAX_BODY} bytes")));
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent <= MAX_BODY + (16 << 20), "{sent} bytes were taken");
}

#[tokio::test]
async fn only_a_few_large_answers_are_in_memory_at_once_and_all_come_in_time() {
    const LARGE: usize = 16 << 20;
    let (mut tasks, sent) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    let address = pouring(&mut tasks, LARGE, sent.clone()).await;
    let client = Client::new(&Config::of([address]));
    let mut asked = JoinSet::new();
    for _ in 0..24 {
        let client = client.clone();
        asked.spawn(async move { client.get_bytes("/v1/health/service/a", &Query::default()).await });
    }
    let mut kept = Vec::new();
    while kept.len() < LARGE_BODIES {
        kept.push(asked.join_next().await.unwrap().unwrap().unwrap());
    }
    // The server keeps the other answers meanwhile, except for the bytes in sockets and buffers.
    let more = tokio::time::timeout(Duration::from_millis(300), asked.join_next()).await;
    assert!(more.is_err(), "a fifth large answer was read");
    let sent_now = sent.load(Ordering::Relaxed);
    assert!(sent_now < LARGE_BODIES * LARGE + 20 * (8 << 20), "{sent_now} bytes were taken");
    drop(kept);
    while let Some(answer) = asked.join_next().await {
        assert_eq!(answer.unwrap().unwrap().value.len(), LARGE);
    }
}

type ScriptedAnswers = &'static [(&'static str, &'static str, &'static str)];
const HEALTHY: ScriptedAnswers = &[
    ("/v1/status/leader", "200", "\"10.0.0.1:8300\""),
    ("dc=dc2", "500", "No path to datacenter"),
    ("", "200", "{}"),
];
const LEADERLESS: ScriptedAnswers = &[("/v1/status/leader", "200", "\"\""), ("", "500", "No cluster leader")];

/// Starts a server that answers each request with the first entry of `answers` whose text occurs in the
/// request line.
async fn server(tasks: &mut JoinSet<()>, answers: ScriptedAnswers) -> Address {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    tasks.spawn(async move {
        loop {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            let (mut first, mut line) = (String::new(), String::new());
            stream.read_line(&mut first).await.unwrap();
            while stream.read_line(&mut line).await.unwrap_or(0) > 2 {
                line.clear();
            }
            let (_, status, body) = answers.iter().find(|(asked, ..)| first.contains(asked)).unwrap();
            let answer = format!(
                "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            _ = stream.get_mut().write_all(answer.as_bytes()).await;
        }
    });
    address
}

#[tokio::test]
async fn a_server_is_not_left_for_what_ails_another_datacenter() {
    let mut tasks = JoinSet::new();
    for (answers, stays) in [(HEALTHY, true), (LEADERLESS, false)] {
        let first = server(&mut tasks, answers).await;
        let second = server(&mut tasks, HEALTHY).await;
        let config = Config::of([first.clone(), second.clone()]);
        let client = Client::new(&config);
        let query = Query { datacenter: Some("dc2".into()), ..Query::default() };
        let failed = client.get_bytes("/v1/catalog/services", &query).await.unwrap_err();
        assert!(failed.to_string().starts_with("GET /v1/catalog/services at"), "{failed}");
        let asked = if stays { first } else { second };
        assert_eq!(client.address(), asked.to_string());
    }
}
