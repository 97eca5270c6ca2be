import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** java Get.java URL: prints status and body. Proxy and trust come from system properties alone. */
class Get {
    public static void main(String[] args) throws Exception {
        var client = HttpClient.newBuilder().proxy(java.net.ProxySelector.getDefault()).build();
        var answer = client.send(HttpRequest.newBuilder(URI.create(args[0])).build(), HttpResponse.BodyHandlers.ofString());
        System.out.println(answer.statusCode() + " " + answer.body());
        System.exit(answer.statusCode() == 200 ? 0 : 1);
    }
}
